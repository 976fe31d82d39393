"""What the flags of main.py and Clothing.py choose between, and their default folder. No torch here: `--help` needs none."""

PREACT = ("preact_resnet18", "preact_narrow")
NETWORKS = ("lenet", "resnet18", "resnet34", "small", *PREACT)
DATA_ROOT = "data/Clothing1M_Official/"
INDEX = "Clothing1m-data.npz"
