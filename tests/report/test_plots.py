import numpy as np
import torch
from PIL import Image

from hf_r2.report import weight_histograms


def test_picture_is_written_with_one_panel_a_model(tmp_path):
    weights = [torch.randn(8, 8), torch.zeros(2, 2)]
    pair = (weights, [weight.sign() for weight in weights])
    heights = []
    for panels in ({"R2": pair}, {"baseline": pair, "R2": pair}):
        path = weight_histograms(panels, tmp_path / "weights.png", "2-bit")
        with Image.open(path) as image:
            heights.append(image.height)
            assert np.asarray(image.convert("L")).std() > 0
    assert heights[1] == 2 * heights[0]
