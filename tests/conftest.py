"""Settings that must be in place before the first Hugging Face or torch import."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest runs several processes; each with all cores would only slow the others
