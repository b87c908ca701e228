"""ASM-UNet: a U-Net whose Mamba blocks visit tokens in a learned order.

Paper: arXiv:2508.07237 (Adaptive Scan Mamba). The block is usable alone::

    from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba
"""
