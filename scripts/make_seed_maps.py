"""Makes the seed of model maps from transformers' own answers, and checks it against them at other sizes.

For each family, tie of the embeddings and format:

1. A tiny model of the family is mapped as the child process maps it, and once more for each size, with that size alone
   changed, in several dtypes. `find_structure` makes one structure of these samples.
2. Two further models, with all sizes and all harmless entries changed at once, are mapped by both. So are they from a
   config.json without the entries that the class has as defaults.

A structure that differs from transformers' answer anywhere is left out, and the reason printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from int8convert.formats.format import Format
from int8convert.planning.model_map.links import Links
from int8convert.planning.model_map.name_patterns import LayerKinds
from int8convert.planning.model_map.seed import SEED, write_seed
from int8convert.planning.model_map.sizes import UnknownStructureError, kind_at, read_config
from int8convert.planning.model_map.structure import Sample, find_structure, outline
from int8convert.planning.model_map.structure_match import apply_structure
from int8convert.planning.model_map.worker import answer
from tests.tools.family_models import Family, families, tiny_config

FORMATS = (Format.BITSANDBYTES, Format.COMPRESSED_TENSORS)
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = ("float16", "float32", "bfloat16")

_CHANGED = {
    **{"width": (128, 192), "inner width": (160, 224), "heads": (8, 16), "key heads": (4, 2), "state heads": (16, 32)},
    **{
        "head width": (32, 48),
        "depth": (4, 5),
        "experts": (6, 8),
        "dense layers": (2, 3),
        "state groups": (4, 8),
        "rank": (48, 40),
    },
    **{"state": (32, 24), "vocabulary": (192, 288), "positions": (320, 416)},
}
"""Kind of size -> two values that differ from those of tiny models."""


def changed(config: Mapping[str, Any], sizes: Mapping[str, int], scope: str = "") -> dict[str, Any]:
    """Return a config with other sizes, and lists of layers as long as its depth says."""
    depth = next((v for k, v in sizes.items() if k.startswith(scope) and kind_at(k) == "depth"), None)
    result: dict[str, Any] = {}
    for key, value in config.items():
        path = scope + key
        if isinstance(value, dict):
            result[key] = changed(value, sizes, f"{path}.")
        elif isinstance(value, list) and value and isinstance(value[0], str) and "layer" in key and depth:
            result[key] = (value + value[-1:] * depth)[:depth]
        else:
            result[key] = sizes.get(path, value)
    return result


class Prober:
    """Maps models of a family as the child process would, in this process."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._class = family.model_class

    def sample(self, config: Mapping[str, Any], output_format: Format, dtype: str, stored: str | None = None) -> Sample:
        """Return the answer on the checkpoint that transformers would save of a config."""
        config = {**config, "architectures": [self.family.class_name], "dtype": dtype}
        before = torch.get_default_dtype()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            read = transformers.AutoConfig.from_pretrained(folder)
            try:
                with torch.device("meta"):
                    torch.set_default_dtype(getattr(torch, dtype))
                    model = self._class(read).eval()
                request = {
                    "directory": folder,
                    "dtype": dtype,
                    "tensors": [[n, stored or _STORED[t.dtype], list(t.shape), None] for n, t in saved_tensors(model)],
                    **{"skip": [], "only": [], "output_format": output_format, "trusts_code": False},
                }
                return Sample(config, request, json.loads(json.dumps(answer(request))))
            finally:
                torch.set_default_dtype(before)


def saved_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model as `save_pretrained` writes them: tied ones once."""
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    yield from revert_weight_conversion(model, state).items()


class Refused(Exception):
    """Raised for a family that gets no structure, with the reason."""


def why_not(samples: list[Sample]) -> str:
    """Return why samples that have a structure each have none in common."""
    alone = sum(find_structure([sample]) is not None for sample in samples)
    pairs = [find_structure([samples[0], sample]) is not None for sample in samples[1:]]
    return f"{alone} of {len(samples)} have one alone, {sum(pairs)} with the first"


def comparable(answered: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in answered.items() if key != "uncounted"}, "candidates": []}


def structures_of(family: Family) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield what was tried, and its structure or why it has none."""
    base = json.loads(json.dumps({**tiny_config(family).to_dict(), "architectures": [family.class_name]}))
    base.pop("dtype", None)
    sizes = read_config(base).sizes
    if any(kind_at(path) == "dense layers" for path in sizes):  # so that two dense layers leave one of experts
        base = changed(base, {path: 3 for path in sizes if kind_at(path) == "depth"})
    for config in variants(family, base):
        for output_format in FORMATS:
            what = f"{family.name} {output_format}, tie {config.get('tie_word_embeddings')}"
            try:
                for structure in Maker(family, config, output_format).make():
                    yield what, structure
            except Exception as error:  # a class may refuse its own config with anything
                yield what, f"{type(error).__name__}: {' '.join(str(error).split())}"


def variants(family: Family, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config with embeddings tied and apart, and with the width of heads stated and derived."""
    ties = (False, True) if isinstance(config.get("tie_word_embeddings"), bool) else (None,)
    head_dims = (None, 16) if config.get("head_dim", 16) is None else (config.get("head_dim"),)
    if "head_dim" not in config and "num_attention_heads" in config and reads_head_dim(family, config):
        head_dims = (None, 16)
    for tie in ties:
        for head_dim in head_dims:
            changes = {"tie_word_embeddings": tie, "head_dim": head_dim}
            yield {**config, **{key: value for key, value in changes.items() if key in config or value is not None}}


def reads_head_dim(family: Family, config: Mapping[str, Any]) -> bool:
    """Return whether the width of heads, of which the class knows nothing, changes the shapes of its modules."""
    prober, shapes = Prober(family), []
    for entries in ({}, {"head_dim": 32}):
        try:
            sample = prober.sample({**config, **entries}, FORMATS[0], DTYPES[0])
        except Exception:  # a class may refuse its own config with anything
            return False
        shapes.append([tensor[2] for tensor in sample.request["tensors"]])
    return shapes[0] != shapes[1]


class Maker:
    """Makes the structures of one family, tie and format."""

    def __init__(self, family: Family, config: Mapping[str, Any], output_format: Format) -> None:
        self._family, self._format, self._base = family, output_format, config
        self._prober = Prober(family)
        self._sizes = read_config(config).sizes
        self._stuck: list[str] = []
        self._frozen: list[str] = []

    def make(self) -> Iterator[dict[str, Any]]:
        varied = [*self._varied()]
        dtypes = {dtype: [self._sample(self._base, dtype, stored) for stored in (None, "F32")] for dtype in DTYPES}
        dtypes["float32"].append(self._sample(self._base, "float32", "F16"))
        joint = find_structure([*varied, *(sample for each in dtypes.values() for sample in each)])
        if joint is not None:
            yield self._checked(joint, DTYPES)
            return
        if find_structure(varied) is None:
            raise Refused(f"no structure in common: {why_not(varied)}")
        for dtype, samples in dtypes.items():
            others = varied if dtype == DTYPES[0] else [*self._varied(dtype)]
            structure = find_structure([*others, *samples])
            if structure is not None:
                yield self._checked(structure, [dtype])

    def _sample(self, config: Mapping[str, Any], dtype: str = DTYPES[0], stored: str | None = None) -> Sample:
        return self._prober.sample(config, self._format, dtype, stored)

    def _varied(self, dtype: str = DTYPES[0]) -> Iterator[Sample]:
        """Yield samples with one size changed, or where its class refuses that, all such sizes in proportion."""
        base = self._sample(self._base, dtype)
        yield base
        stuck = []
        for path in self._sizes:
            sample = self._alike(base, {path: self._other(path, 0)}, dtype)
            if sample is None:
                stuck.append(path)
            else:
                yield sample
        rope = self._base.get("rope_parameters")
        for changes in _ROPES if isinstance(rope, dict) and "rope_type" in rope else ():
            sample = self._alike(base, {}, dtype, {"rope_parameters": {"rope_theta": 1e4, **changes}})
            if sample is not None:
                yield sample
        for factor in (2, 3) if stuck else ():
            sample = self._alike(base, {path: factor * self._sizes[path] for path in stuck}, dtype)
            if sample is None:
                self._frozen = stuck
                break
            yield sample
        needed = ("hidden_size", "d_model", "n_embd", "hidden_layers", "n_layer")
        if any(path.endswith(needed) for path in self._frozen):
            raise Refused(f"its sizes cannot be changed: {', '.join(stuck)}")
        self._stuck = stuck

    def _alike(
        self, base: Sample, sizes: Mapping[str, int], dtype: str, entries: Mapping[str, Any] | None = None
    ) -> Sample | None:
        """Return the sample of other sizes, if its model has the same modules."""
        try:
            sample = self._sample({**changed(self._base, sizes), **(entries or {})}, dtype)
        except Exception:  # a class may refuse sizes with anything
            return None
        is_alike = outline(base.config, base.request) == outline(sample.config, sample.request)
        return sample if is_alike else None

    def _other(self, path: str, i: int) -> int:
        values = [value for value in _CHANGED[kind_at(path) or ""] if value != self._sizes[path]]
        return values[i % len(values)]

    def _at(self, i: int) -> dict[str, int]:
        """Return further sizes, all of them changed, and different for sizes of one kind."""
        seen: Counter[str | None] = Counter()
        sizes = {}
        for path, size in self._sizes.items():
            seen[kind_at(path)] += 1
            factor = 1 if path in self._frozen else 4 + i
            sizes[path] = factor * size if path in self._stuck else self._other(path, i) * seen[kind_at(path)]
        return sizes

    def _checked(self, structure: dict[str, Any], dtypes: Any) -> dict[str, Any]:
        for dtype, i in zip((*dtypes, *dtypes)[:2], (0, 1), strict=True):
            config = with_harmless_changes(changed(self._base, self._at(i)))
            self._compare(structure, config, dtype, "at another size")
        structure = {**structure, "ignored": self._ignored(structure, dtypes[0])}
        defaulted = {**structure, **self._defaults(structure)}
        try:
            for i in (0, 1):
                derived = [path for path, link in defaulted["absent"].items() if not link.isdigit()]
                config = without(changed(self._base, self._at(i)), {*defaulted["optional"], *derived})
                alias_of = {name: alias for alias, name in defaulted["aliases"].items()} if i else {}
                config = {alias_of.get(name, name): value for name, value in config.items()}
                self._compare(defaulted, config, dtypes[0], "with defaults")
        except Exception as error:
            print(f"  {self._family.name}: needs all entries: {error}")
            return structure
        return defaulted

    def _compare(self, structure: Mapping[str, Any], config: Mapping[str, Any], dtype: str, how: str) -> None:
        sample = self._sample(config, dtype)
        made = apply_structure(structure, sample.config, sample.request)
        if made != comparable(sample.answer):
            raise Refused(f"differs {how}")

    def _ignored(self, structure: Mapping[str, Any], dtype: str) -> list[str]:
        """Return the entries of other classes that change nothing."""
        config_class = type(tiny_config(self._family))
        known = {*self._base, *config_class.attribute_map}
        stale = [key for key in _STALE if key not in known]

        def is_ignored(names: list[str]) -> bool:
            config = {**changed(self._base, self._at(1)), **{name: _STALE[name] for name in names}}
            try:
                self._compare({**structure, "ignored": names}, config, dtype, "with stale entries")
            except Exception:  # a class may refuse entries with anything
                return False
            return True

        found = stale if is_ignored(stale) else [name for name in stale if is_ignored([name])]
        return found if is_ignored(found) else []

    def _defaults(self, structure: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries that config.json may lack, and the links of the sizes that it may lack."""
        config_class = type(tiny_config(self._family))
        default = read_config(json.loads(json.dumps({**config_class().to_dict(), "architectures": []})))
        named = ("architectures", "model_type")
        flags = {path: value for path, value in structure["flags"].items() if path not in named}
        optional = [p for p, v in flags.items() if p in default.flags and default.flags[p] == v]
        optional += [path for path in structure["layer_lists"] if structure["layers"] != LayerKinds.BY_CONFIG]
        absent = {path: link for path in structure["sizes"] if (link := self._default_link(path))}
        absent = dict(sorted(absent.items(), key=lambda each: not each[1].isdigit()))  # links may need other defaults
        return {"optional": optional, "absent": absent, "aliases": dict(config_class.attribute_map)}

    def _default_link(self, path: str) -> str | None:
        if "." in path:
            return None
        found, rests = [], []
        for i in (0, 1):
            sizes = self._at(i)
            config = without(changed(self._base, sizes), {path})
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(config))
                try:
                    value = transformers.AutoConfig.from_pretrained(folder).to_dict().get(path)
                except Exception:
                    return None
            found.append(value)
            rests.append({name: size for name, size in sizes.items() if name != path})
        if not all(type(value) is int and value > 0 for value in found):
            return None
        try:
            links = [str(found[0])] if found[0] == found[1] else Links(rests).of_shape(tuple(found))
            return links[0] if len(links) == 1 else None
        except UnknownStructureError:
            return None


def without(config: Mapping[str, Any], paths: set[str], scope: str = "") -> dict[str, Any]:
    """Return a config without some entries."""
    return {
        key: without(value, paths, f"{scope}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if scope + key not in paths
    }


_HARMLESS_CHANGES: dict[str, Any] = {
    **{"use_cache": False, "initializer_range": 0.03, "rope_theta": 5e5, "sliding_window": 77, "max_window_layers": 1},
    **{"num_experts_per_tok": 1, "norm_topk_prob": True, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 3},
    **{"router_aux_loss_coef": 0.5, "output_router_logits": True, "rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3},
    **{"query_pre_attn_scalar": 77, "final_logit_softcapping": 9.0, "attn_logit_softcapping": 9.0, "logit_scale": 0.5},
    **{"embedding_multiplier": 2.0, "residual_multiplier": 2.0, "routed_scaling_factor": 3.0, "logits_scaling": 3.0},
    "layer_norm_epsilon": 1e-3,
}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
)
_STALE: dict[str, Any] = {
    **{"use_mrope": True, "hidden_act": "relu", "cache_implementation": "hybrid", "sliding_window_size": 7},
    **{"position_embedding_type": "relative_key", "activation_dropout": 0.5, "pretraining_tp": 2, "mlp_bias": True},
    **{"attention_bias": True, "summary_type": "mean", "scale_attention_softmax_in_fp32": False},
}
"""Entries that config.json has of other classes or versions."""


def with_harmless_changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other values of entries that change no module."""
    result = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = with_harmless_changes(value)
        is_changed = value is not None and not isinstance(value, dict)
        result[key] = _HARMLESS_CHANGES.get(key, value) if is_changed else value
    return result


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    structures: dict[str, list[dict[str, Any]]] = {}
    reasons: Counter[str] = Counter()
    wanted = sys.argv[1:]
    for family in families():
        if wanted and family.name not in wanted:
            continue
        try:
            found = [*structures_of(family)]
        except Exception as error:  # a family that cannot be built
            found = [(family.name, f"{type(error).__name__}: {error}")]
        for what, structure in found:
            if isinstance(structure, str):
                reasons[structure] += 1
                print(f"{what}: {structure[:200]}", flush=True)
            elif structure not in structures.setdefault(family.class_name, []):
                structures[family.class_name].append(structure)
    write_seed(SEED, structures)
    print(
        f"{sum(map(len, structures.values()))} structures of {len(structures)} classes, {SEED.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
