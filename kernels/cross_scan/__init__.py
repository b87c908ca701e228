"""Images and volumes walked in several directions, and put together again.

Shape legend: B batch, C channels, (H, W) or (Z, H, W) the image, L its tokens, K directions.

Each direction is a permutation of the tokens made of flipped and exchanged axes, so plain PyTorch copies are all it
takes, forward and backward. Nothing of it is needed where one scan walks in several orders: :func:`cross_orders` is
the ``scan_order`` of :func:`bestiary.kernels.selective_scan_fn`.
"""

from __future__ import annotations

import torch

_Direction = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes of the image that are walked backwards, and the axes from the slowest to the fastest."""

_SCANS = "0 (every axis fastest in turn), 1 (copies), 2 (raster only) and, for images, 3 (rotations)"


def cross_scan_fn(
    x: torch.Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> torch.Tensor:
    """An image as K sequences, one for each direction.

    Drop-in for VMamba's ``cross_scan_fn``. Images have K = 4 directions, volumes K = 6:

    - ``scans=0``: row by row, column by column, and both backwards. A volume: raster order with its axes as
      (Z, H, W), (H, W, Z) and (W, Z, H), and the three backwards.
    - ``scans=1``: K times row by row.
    - ``scans=2``: half of them row by row, half backwards.
    - ``scans=3``: the image turned by 0, 90, 180 and 270 degrees, row by row. Not for volumes.

    Differs from VMamba's: ``scans=2`` and ``scans=3`` mean the same whichever axis has the channels; there,
    channel-last input is flipped along another axis or stacked in another place.

    Paper: arXiv:2401.10166 Sec. 4. Source: the official code of VMamba.

    Args:
        x: (B, C, H, W) or (B, C, Z, H, W); channel-last (B, …, C). With ``one_by_one`` (B, K, C, …) or (B, …, K, C).
        in_channel_first: where x has its channels.
        out_channel_first: where the result has them.
        one_by_one: x holds a tensor for each direction already.
        scans: which directions.
        force_torch: accepted; it is always PyTorch.

    Returns:
        (B, K, C, L), or (B, L, K, C) where ``out_channel_first`` is off: direction k holds the tokens in the order
        ``cross_orders(shape, scans)[k]``.

    Raises:
        ValueError: if the shape or ``scans`` does not fit.
    """
    dims = x.ndim - 2 - one_by_one
    directions = _directions("cross_scan_fn", x, dims, scans, one_by_one, in_channel_first)
    K = len(directions)
    images = x.unbind(1 if in_channel_first else -2) if one_by_one else [x] * K
    channels = 1 if in_channel_first else -1
    walks = [
        _walk(image.movedim(channels, -1), direction, out_channel_first)
        for image, direction in zip(images, directions, strict=True)
    ]
    return torch.stack(walks, 1 if out_channel_first else 2)


def cross_merge_fn(
    y: torch.Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> torch.Tensor:
    """The adjoint of :func:`cross_scan_fn`: sequences back to image order, and summed over the directions.

    Drop-in for VMamba's ``cross_merge_fn``. The names of the arguments are those of the scan that is undone: y has
    the layout that ``out_channel_first`` says, the result that of ``in_channel_first``.

    Args:
        y: (B, K, C, H, W) or (B, K, C, Z, H, W), or (B, …, K, C): sequences, shaped as the image.
        in_channel_first: where the result has its channels.
        out_channel_first: where y has them.
        one_by_one: keep the directions apart instead of summing them.
        scans: which directions, see :func:`cross_scan_fn`.
        force_torch: accepted; it is always PyTorch.

    Returns:
        (B, C, L) or (B, L, C) in image order; with ``one_by_one`` (B, K, C, L) or (B, L, K, C).

    Raises:
        ValueError: if the shape or ``scans`` does not fit.
    """
    directions = _directions("cross_merge_fn", y, y.ndim - 3, scans, True, out_channel_first)
    shape = y.shape[3:] if out_channel_first else y.shape[1:-2]
    walks = y.unbind(1 if out_channel_first else -2)
    # to (B, …, C): the rest is the same for both layouts
    images = [
        _unwalk(walk.movedim(1 if out_channel_first else -1, -1), shape, direction, in_channel_first)
        for walk, direction in zip(walks, directions, strict=True)
    ]
    if one_by_one:
        return torch.stack(images, 1 if in_channel_first else 2)
    total = images[0]
    for image in images[1:]:
        total = total + image
    return total


def cross_orders(shape: tuple[int, ...], scans: int = 0, device: torch.device | str | None = None) -> torch.Tensor:
    """The directions of :func:`cross_scan_fn` as scan orders.

    Args:
        shape: (H, W) or (Z, H, W).
        scans: which directions.
        device: of the result.

    Returns:
        (K, L) int64: ``cross_scan_fn(x)[:, k] == x.flatten(2)[..., order[k]]``.

    Raises:
        ValueError: if the shape or ``scans`` does not fit.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"cross_orders needs a shape (H, W) or (Z, H, W), got {tuple(shape)}")
    tokens = torch.arange(torch.Size(shape).numel(), device=device)
    return cross_scan_fn(tokens.reshape(1, 1, *shape), scans=scans)[0, :, 0]


def _directions(
    name: str, x: torch.Tensor, dims: int, scans: int, several: bool, channel_first: bool
) -> list[_Direction]:
    """The K directions of an image of 2 or 3 dimensions, or ValueError."""
    if dims not in (2, 3):
        axes = ("B", "K", "C", "…") if several else ("B", "C", "…")
        if not channel_first:
            axes = (axes[0], "…", *axes[1:-1])
        raise ValueError(f"{name} needs ({', '.join(axes)}) with an image (H, W) or (Z, H, W), got {tuple(x.shape)}")
    if scans not in (0, 1, 2, 3) or (scans == 3 and dims == 3):
        raise ValueError(f"{name}: scans={scans} is none of {_SCANS}")
    plain, every = tuple(range(dims)), tuple(range(dims))
    if scans == 0:  # the transpose of an image, the rotations of a volume's axes
        forward = [(*plain[i:], *plain[:i]) for i in range(dims)]
        directions = [((), axes) for axes in forward] + [(every, axes) for axes in forward]
    elif scans == 1:
        directions = [((), plain)] * (2 * dims)
    elif scans == 2:
        directions = [((), plain)] * dims + [(every, plain)] * dims
    else:
        directions = [((), plain), ((1,), (1, 0)), (every, plain), ((0,), (1, 0))]
    K = len(directions)
    found = x.shape[1 if channel_first else -2]
    if several and found != K:
        raise ValueError(f"{name} needs {K} directions for an image of {dims} dimensions, got {found}")
    return directions


def _walk(image: torch.Tensor, direction: _Direction, channel_first: bool) -> torch.Tensor:
    """(B, *image, C) to (B, C, L) or (B, L, C) in walking order."""
    backwards, axes = direction
    dims = len(axes)
    image = image.flip([a + 1 for a in backwards]) if backwards else image
    image = image.permute(0, *(a + 1 for a in axes), dims + 1)
    return image.movedim(-1, 1).flatten(2) if channel_first else image.flatten(1, dims)


def _unwalk(walk: torch.Tensor, shape: torch.Size, direction: _Direction, channel_first: bool) -> torch.Tensor:
    """(B, *image, C), the tokens being in walking order, to (B, C, L) or (B, L, C) in image order."""
    backwards, axes = direction
    dims = len(axes)
    image = walk
    if axes != tuple(range(dims)):
        image = walk.flatten(1, dims).unflatten(1, [shape[a] for a in axes])
        image = image.permute(0, *(axes.index(a) + 1 for a in range(dims)), dims + 1)
    image = image.flip([a + 1 for a in backwards]) if backwards else image
    return image.movedim(-1, 1).flatten(2) if channel_first else image.flatten(1, dims)
