"""Make the golden checkpoint of palettes of vectors in format version 1. It is made once, as that of make_v1.py.

    python tests/golden/make_v1_vectors.py

Beside the checkpoint lies expected.safetensors, the state that it loads as.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_r2 import R2QuantizationConfig
from hf_r2.quantization import compress

DIRECTORY = Path(__file__).with_name("v1_vectors")
SETTINGS = {
    "method": "palette",
    "bits": 4,
    "grain": "tensor",
    "cluster_dim": 4,
    # The embedding, tied to the output layer, and every Conv1D, which transformers stores (in, out)
    "include": ["transformer.wte.weight", "transformer.h.*"],
    "overrides": {
        # Groups of 8, of 5 and 3 (2 and 1 codes), of 32 in one vector of 64, and of 8 in 2 of 5
        "transformer.h.0.attn.c_attn.weight": {"bits": 2, "grain": "channel", "cluster_dim": 2},
        "transformer.h.0.attn.c_proj.weight": {"bits": 1, "grain": 5, "cluster_dim": 3},
        "transformer.h.0.mlp.c_proj.weight": {"bits": 1, "grain": "channel", "cluster_dim": 64},
        "transformer.h.0.mlp.c_fc.weight": {"bits": 3, "grain": 8, "cluster_dim": 5},
        "transformer.h.1.attn.c_attn.weight": {"bits": 8, "cluster_dim": 7},
        "transformer.h.1.attn.c_proj.weight": {"bits": 2, "cluster_dim": 1},
    },
}


def main(directory: Path = DIRECTORY) -> None:
    """Write the checkpoint and the state that it loads as.

    Raises:
        SystemExit: if the directory exists.

    """
    if directory.exists():
        sys.exit(f"{directory} exists; a golden checkpoint is never made again")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    compress(model, R2QuantizationConfig(**SETTINGS))
    model.save_pretrained(directory)
    state = model.state_dict()
    del state["lm_head.weight"]  # the embedding once more
    save_file(state, directory / "expected.safetensors")


if __name__ == "__main__":
    main()
