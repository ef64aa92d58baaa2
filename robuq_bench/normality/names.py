"""What can be asked of the analysis, known without importing it (or torch)."""

MIN_IMAGES = 16
#: What `transforms.py` makes.
TRANSFORMS = (
    "identity",
    "hadamard",
    "hadamard-without-dc",
    "randomized-hadamard",
    "random-orthogonal",
    "block-hadamard-64",
    "block-hadamard-128",
    "dual-rotation",
)
