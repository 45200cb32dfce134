import json

import pytest

from hf_r2.codecs import CodecSettings

COMPLETE = [
    ({}, {"method": "uniform", "bits": 4, "grain": "channel", "symmetric": True, "grid": "restricted"}),
    ({"symmetric": False}, {"symmetric": False, "grid": None, "range": "min_max"}),
    ({"grid": "midrise", "bits": 1}, {"bits": 1, "range": "min_max"}),
    ({"grid": "midrise", "range": "mse"}, {"symmetric": True, "grid": "midrise", "range": "mse"}),
    ({"method": "palette", "bits": 1}, {"symmetric": None, "grid": None, "range": None, "grain": "channel"}),
    ({"method": "palette"}, {"cluster_dim": 1}),
    ({"method": "palette", "cluster_dim": 64, "bits": 8}, {"cluster_dim": 64, "symmetric": None, "range": None}),
    ({"method": "uniform"}, {"cluster_dim": None}),
    ({"method": "least_squares"}, {"basis": "optimal", "bits": 4, "symmetric": None, "cluster_dim": None}),
    ({"method": "least_squares", "basis": "ternary", "bits": 2}, {"basis": "ternary"}),
    ({"method": "palette", "bits": 2}, {"basis": None}),
    ({"grain": "64"}, {"grain": 64}),
    ({"grain": "tensor", "bits": 8}, {"grain": "tensor", "bits": 8}),
]


@pytest.mark.parametrize(("given", "expected"), COMPLETE)
def test_settings_are_completed_with_the_defaults_of_their_method(given, expected):
    settings = CodecSettings(**given)
    assert {key: getattr(settings, key) for key in expected} == expected


@pytest.mark.parametrize("given", [given for given, _ in COMPLETE])
def test_settings_survive_json(given):
    settings = CodecSettings(**given)
    assert CodecSettings(**json.loads(json.dumps(settings.to_dict(), sort_keys=True))) == settings


def test_a_palette_is_written_without_the_options_of_uniform():
    assert CodecSettings("palette", 2, 16).to_dict() == {"method": "palette", "bits": 2, "grain": 16}


def test_a_palette_of_single_values_is_written_as_it_was_before_there_were_vectors():
    single = CodecSettings("palette", 2, 16, cluster_dim=1)
    assert single == CodecSettings("palette", 2, 16)
    assert single.to_dict() == {"method": "palette", "bits": 2, "grain": 16}
    vectors = CodecSettings("palette", 2, 16, cluster_dim=2)
    assert vectors.to_dict() == {"method": "palette", "bits": 2, "grain": 16, "cluster_dim": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "vector"}, "unknown method 'vector': use one of uniform, palette"),
        ({"method": None}, "unknown method None"),
        ({"bits": 1}, "bits=1 .* from 2 to 8 for uniform; method='palette' goes down to 1 bit"),
        ({"bits": 9}, "bits=9 .* from 2 to 8"),
        ({"bits": 4.0}, r"bits=4\.0 .* whole number"),
        ({"bits": "4"}, "bits='4' .* whole number"),
        ({"bits": True, "method": "palette"}, "bits=True .* whole number"),
        ({"bits": None}, "bits=None"),
        ({"bits": 0, "method": "palette"}, "bits=0 .* from 1 to 8 for palette$"),
        ({"bits": 9, "method": "palette"}, "bits=9 .* from 1 to 8 for palette$"),
        ({"grain": "row"}, "unknown grain 'row': use 'tensor', 'channel' or a positive group size"),
        ({"grain": 0}, "unknown grain 0"),
        ({"grain": "0"}, "unknown grain 0"),
        ({"grain": -8}, "unknown grain -8"),
        ({"grain": True}, "unknown grain True"),
        ({"grain": 2.5}, r"unknown grain 2\.5"),
        ({"grain": None}, "unknown grain None"),
        ({"grain": [32]}, r"unknown grain \[32\]"),
        ({"symmetric": "yes"}, "symmetric='yes' is not true or false"),
        ({"symmetric": 0}, "symmetric=0 is not true or false"),
        ({"grid": "narrow"}, "unknown grid 'narrow': use one of restricted, full, midrise"),
        ({"grid": "full", "symmetric": False}, "grid='full' needs symmetric=True"),
        ({"range": "max"}, "unknown range 'max': use one of min_max, mse"),
        *(
            ({"method": "least_squares", "bits": bits}, f"bits={bits} is not a whole number from 1 to 8")
            for bits in (0, 9, -1)
        ),
        ({"method": "least_squares", "basis": "best"}, "unknown basis 'best': use one of optimal, greedy, ternary"),
        *(
            ({"method": "least_squares", "basis": "ternary", "bits": bits}, f"three levels.*set bits=2, not {bits}")
            for bits in (1, 3, 8)
        ),
        *(
            ({"method": "palette", "cluster_dim": value}, rf"cluster_dim={value!r} is not a whole number from 1 to 64")
            for value in (0, -1, 65, 2.0, "2", True)
        ),
        ({"method": "palette", "cluster_dim": [2]}, r"cluster_dim=\[2\] is not a whole number from 1 to 64"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        CodecSettings(**given)


@pytest.mark.parametrize(("option", "value"), [("symmetric", True), ("grid", "full"), ("range", "mse")])
def test_an_option_of_another_method_is_refused(option, value):
    with pytest.raises(ValueError, match=f"'{option}' is an option of method 'uniform'; remove it for 'palette'"):
        CodecSettings(method="palette", **{option: value})


@pytest.mark.parametrize("method", ["uniform", "palette"])
def test_a_basis_is_refused_outside_least_squares(method):
    with pytest.raises(ValueError, match=f"'basis' is an option of method 'least_squares'; remove it for '{method}'"):
        CodecSettings(method, basis="optimal")


def test_a_basis_is_always_written():
    settings = CodecSettings("least_squares", 2, 16)
    assert settings.to_dict() == {"method": "least_squares", "bits": 2, "grain": 16, "basis": "optimal"}


@pytest.mark.parametrize("value", [1, 2, 0])
def test_vectors_are_refused_outside_palettes(value):
    with pytest.raises(ValueError, match="'cluster_dim' is an option of method 'palette'; remove it for 'uniform'"):
        CodecSettings(cluster_dim=value)


def test_settings_are_the_same_for_every_name():
    settings = CodecSettings(bits=3)
    assert settings.settings_for("layer.weight") is settings
    assert settings.settings_for(None) is settings


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(AttributeError):
        CodecSettings().bits = 99
