"""bestiary: a zoo of multimodal research models.

Importing this package loads nothing heavy; the rooms are `bestiary.kernels`, `bestiary.shared` and
`bestiary.projects`.
"""

__version__ = "0.1.0"
