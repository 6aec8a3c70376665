"""Config entries for single layers, and how they change when layers are removed. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from capacity_gap.models.defaults import completed
from capacity_gap.settings.errors import ConfigError

EACH = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with one entry a layer


def symmetric_layers(layers: int, keep: int) -> list[int]:
    """Which layers stay when they are removed from both ends, one more from the top if odd (docs/method.md §3)."""
    bottom = (layers - keep) // 2
    return list(range(bottom, bottom + keep))


def of_kept_layers(config: Mapping[str, Any], layers_key: str, stay: Sequence[int]) -> dict[str, Any]:
    """The entries of a config.json that describe single layers, for a student with the layers that stay.

    Args:
        config: the teacher's config.json.
        layers_key: its entry that holds the number of layers.
        stay: the numbers of the layers that stay.

    Raises:
        ConfigError: layers are removed, and the meaning of an entry for single layers is not known.
    """
    full = completed(config)
    layers = full[layers_key]
    if list(stay) == list(range(layers)):
        return {}
    assumed = completed({**config, layers_key: len(stay)})
    found: dict[str, Any] = {}
    for key, value in full.items():
        if "layer" not in key or not isinstance(value, list) or not value:
            continue
        if key not in EACH or len(value) != layers:
            raise ConfigError(
                f"config.json has {key}={value}, a per-layer setting, and {layers - len(stay)} of {layers} "
                "layers would be removed, which changes its meaning in unknown ways. Keep all layers: leave out "
                "prune.depth."
            )
        mine = [value[i] for i in stay]
        # An entry that transformers assumes for the new depth anyway stays implicit.
        if key in config or mine != assumed.get(key):
            found[key] = mine
    kinds = full.get("layer_types") or []
    if "max_window_layers" in config and len(set(kinds)) > 1 and "layer_types" in found:
        found["max_window_layers"] = _first_window(found["layer_types"])
    return found


def _first_window(kinds: Sequence[str]) -> int:
    """The first layer whose attention slides, for readers that know no `layer_types`; the depth if there is none."""
    return kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)


def renumbered(config: Mapping[str, Any], layers: int, keep: int, *, symmetric: bool) -> bool:
    """Whether layers get another number that matters, and the student's planned config.json does not show it.

    It shows the kinds of layers that are taken from both ends; not those that scores choose, nor a factor that the
    model divides by the layer's number (GPT-2's `scale_attn_by_inverse_layer_idx`), which is folded into the weights.
    """
    if keep == layers:
        return False
    full = completed(config)
    scaled, lists = full.get("scale_attn_by_inverse_layer_idx"), [v for k, v in full.items() if "layer" in k]
    if symmetric:
        return bool(scaled) and symmetric_layers(layers, keep)[0] > 0
    return bool(scaled) or any(len(set(map(str, v))) > 1 for v in lists if isinstance(v, list))
