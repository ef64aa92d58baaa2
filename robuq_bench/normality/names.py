"""What can be asked of the analysis, known without importing it (or torch)."""

MIN_IMAGES = 16
#: A layer type is normal enough for b bits where the interval of its mean error ratio lies below.
VERDICT_LIMIT = 1.05
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
