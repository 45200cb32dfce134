import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_r2.selection import output_first, scaled, select_weights

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class TiedLayers(nn.Module):
    """`first` and `last` hold one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.middle = nn.Linear(3, 4)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight


@pytest.fixture
def zoo():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "linear": nn.Linear(4, 3),
            "norm": nn.LayerNorm(4),
            "conv1d": nn.Conv1d(2, 3, 3),
            "conv2d": nn.Conv2d(2, 3, 3),
            "conv3d": nn.Conv3d(2, 3, 2),
            "transposed": nn.ConvTranspose2d(2, 3, 2),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "batch_norm": nn.BatchNorm2d(6),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "transformers_conv1d": Conv1D(7, 4),
        }
    )


COMPUTE = ["linear", "conv1d", "conv2d", "conv3d", "grouped", "depthwise", "transformers_conv1d"]


def tiny_gpt2(device="cpu", **options):
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0, **options
    )
    with torch.device(device):
        return GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=["cpu", "meta"])
def gpt2(request):
    return tiny_gpt2(request.param)


def test_every_compute_layer_is_selected_in_module_order(zoo):
    assert list(select_weights(zoo)) == [f"{name}.weight" for name in COMPUTE]


def test_each_name_maps_to_its_module_and_attribute(zoo):
    assert select_weights(zoo) == {f"{name}.weight": (zoo[name], "weight") for name in COMPUTE}


def test_a_bare_layer_is_selected_as_weight():
    layer = nn.Linear(2, 2)
    assert select_weights(layer) == {"weight": (layer, "weight")}


def test_an_embedding_is_selected_when_included(zoo):
    assert list(select_weights(zoo, include=["embedding.weight"])) == ["embedding.weight"]


def test_include_keeps_the_module_order(zoo):
    chosen = select_weights(zoo, include=["grouped.*", "conv?d.weight"])
    assert list(chosen) == ["conv1d.weight", "conv2d.weight", "conv3d.weight", "grouped.weight"]


def test_exclude_leaves_out_what_include_named(zoo):
    assert list(select_weights(zoo, include=["conv*"], exclude=["*2d*"])) == ["conv1d.weight", "conv3d.weight"]


def test_patterns_match_case(zoo):
    with pytest.raises(ValueError, match=r"'Linear\.weight' matches no weight"):
        select_weights(zoo, include=["Linear.weight"])


@pytest.mark.parametrize(("min_numel", "selected"), [(12, True), (13, False)])
def test_min_numel_is_the_smallest_size_selected(zoo, min_numel, selected):
    assert ("linear.weight" in select_weights(zoo, min_numel=min_numel)) == selected


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_typo_in_a_pattern_raises_with_a_near_name(zoo, option):
    with pytest.raises(ValueError, match=r"'depthwize\.weight' matches no weight; near names: \['depthwise\.weight'"):
        select_weights(zoo, **{option: ["linear.weight", "depthwize.weight"]})


def test_a_pattern_for_a_layer_that_is_no_candidate_raises(zoo):
    with pytest.raises(ValueError, match="matches no weight"):
        select_weights(zoo, include=["norm.weight"])


@pytest.mark.parametrize("options", [{"min_numel": 10**6}, {"exclude": ["*"]}])
def test_an_empty_selection_raises_with_the_options_and_candidates(zoo, options):
    ((option, value),) = options.items()
    with pytest.raises(ValueError) as error:
        select_weights(zoo, **options)
    assert f"{option}={value}" in str(error.value)
    assert "8 candidates" in str(error.value)
    assert "'linear.weight'" in str(error.value)


def test_a_model_without_compute_layers_raises():
    with pytest.raises(ValueError, match="no weight of Sequential is selected"):
        select_weights(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))


def test_parametrized_weights_are_selected_under_their_plain_name(zoo):
    for name in ("linear", "conv2d", "transformers_conv1d"):
        parametrize.register_parametrization(zoo[name], "weight", Doubled())
    assert list(select_weights(zoo)) == [f"{name}.weight" for name in COMPUTE]


def test_the_attribute_of_a_parametrized_weight_is_the_weight_that_computes():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    ((module, attribute),) = select_weights(layer).values()
    assert torch.equal(getattr(module, attribute), 2 * before)


def test_a_tied_weight_is_selected_once():
    assert list(select_weights(TiedLayers())) == ["first.weight", "middle.weight"]


@pytest.mark.parametrize("name", ["first.weight", "last.weight"])
def test_a_tied_weight_is_included_by_either_name(name):
    assert list(select_weights(TiedLayers(), include=[name])) == ["first.weight"]


@pytest.mark.parametrize("name", ["first.weight", "last.weight"])
def test_a_tied_weight_is_excluded_by_either_name(name):
    assert list(select_weights(TiedLayers(), exclude=[name])) == ["middle.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_string_is_not_read_as_a_list_of_letters(option):
    with pytest.raises(ValueError, match=rf"{option} is a list of patterns; write \['weight\*'\]"):
        select_weights(nn.Linear(2, 2), **{option: "weight*"})


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_module_under_two_names_is_excluded_by_either_name(name):
    shared = nn.Linear(3, 3)
    assert list(select_weights(nn.Sequential(shared, nn.Linear(3, 3), shared), exclude=[name])) == ["1.weight"]


def test_a_weight_that_keeps_its_later_name_stands_in_the_order_of_that_name():
    model = TiedLayers()
    model.all_tied_weights_keys = {"first.weight": "last.weight"}
    assert list(select_weights(model)) == ["middle.weight", "last.weight"]


def test_a_head_tied_to_an_embedding_is_not_selected_by_default(gpt2):
    assert not {HEAD, EMBEDDING} & set(select_weights(gpt2))


@pytest.mark.parametrize("include", [["*"], [EMBEDDING], [HEAD, EMBEDDING]])
def test_a_head_tied_to_an_embedding_is_selected_once_when_the_embedding_is_included(gpt2, include):
    chosen = select_weights(gpt2, include=include)
    assert {HEAD, EMBEDDING} & set(chosen) == {EMBEDDING}
    assert chosen[EMBEDDING] == (gpt2.transformer.wte, "weight")


def test_a_head_tied_to_an_embedding_needs_the_embedding_to_be_included(gpt2):
    assert EMBEDDING not in select_weights(gpt2, include=[HEAD, "*.c_fc.weight"])


@pytest.mark.parametrize("name", [HEAD, EMBEDDING])
def test_a_head_tied_to_an_embedding_is_excluded_by_either_name(gpt2, name):
    assert not {HEAD, EMBEDDING} & set(select_weights(gpt2, include=["*"], exclude=[name]))


def test_gpt2_layers_are_selected_alike_on_every_device(gpt2):
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(select_weights(gpt2)) == [f"transformer.h.0.{layer}.weight" for layer in layers]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_untied_head_is_selected(device):
    assert HEAD in select_weights(tiny_gpt2(device, tie_word_embeddings=False))


def test_a_tie_is_known_from_the_table_when_a_skeleton_holds_two_tensors():
    model = tiny_gpt2("meta")
    model.lm_head.weight = nn.Parameter(torch.empty(11, 8, device="meta"))
    assert {HEAD, EMBEDDING} & set(select_weights(model, include=["*"])) == {EMBEDDING}


@pytest.mark.parametrize("name", COMPUTE)
def test_output_first_puts_the_output_channels_first(zoo, name):
    module = zoo[name]
    outputs = 7 if name == "transformers_conv1d" else module.bias.numel()
    assert output_first(module, module.weight).shape[0] == outputs


@pytest.mark.parametrize("name", COMPUTE)
def test_output_first_is_its_own_inverse(zoo, name):
    module = zoo[name]
    assert torch.equal(output_first(module, output_first(module, module.weight)), module.weight)


def test_a_strength_of_any_number_is_a_float():
    assert isinstance(scaled(1, None), float)
    assert scaled(2, torch.tensor([0.5, 3.0])).tolist() == [1, 6]
    assert scaled(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])).tolist() == [0.5, 6]
