"""Judge a converted checkpoint against its source, with what anyone has installed: transformers and bitsandbytes.

`scripts/demo.py` starts this as its own process, and nothing of int8convert is imported here: what loads in this
process loads for everyone. How it goes:
1. The source is loaded in float32, and the same weights once more with every decoder Linear in vector-wise int8.
2. The converted checkpoint is loaded as its own config says, that is, with float16 around its int8 layers. Keys that
   are missing, unexpected or of the wrong shape, and Linears that did not come out as int8 layers, end the run.
3. All three read the same held-out tokens; perplexity, KL divergence and top-1 agreement come out as JSON on stdout.

With `--runtime int8convert` the converted checkpoint is loaded by int8convert instead, and compared with the source
alone.

Costs three small models and their logits for one batch.

Left out on purpose: confidence intervals; the differences shown are many times the noise of paired measurements.
"""

import argparse
import copy
import json
import logging
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

N_STEPS = 127
BATCH = 16
OUR_MODULES = {"int8convert", "cuda_kernels", "small_model", "train_small_model", "outlier_injection", "stdlib_text"}


class VectorwiseInt8Linear(nn.Module):
    """What int8 without decomposition makes of a Linear: y = (q(x) q(W)^T) * x_scale * weight_scale + bias.

    The codes are whole numbers held in float32, exact as long as in_features is at most 1,040.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.codes, self.scale = quantize_rows(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_codes, x_scale = quantize_rows(x)
        y = (x_codes @ self.codes.T) * x_scale * self.scale.squeeze(-1)
        return y if self.bias is None else y + self.bias


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of x [..., n], whole numbers in [-127, 127], and the scale of each row [..., 1]."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    inv_scale = torch.where(absmax > 0, N_STEPS / absmax, 0.0)
    return torch.round(x * inv_scale), absmax / N_STEPS


def list_decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears that LLM.int8() quantizes, by module name: all but the output head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if name != "lm_head"}


def build_naive(source: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `source` with every decoder Linear in vector-wise int8, no feature excepted."""
    naive = copy.deepcopy(source)
    for name, linear in list_decoder_linears(naive).items():
        naive.set_submodule(name, VectorwiseInt8Linear(linear))
    return naive


def load_converted(folder: Path, expected_int8: set[str]) -> PreTrainedModel:
    """Load the checkpoint as its config says, and make sure that it is complete and int8.

    Raises:
        SystemExit: a key is missing, unexpected or mismatched, or a module of `expected_int8` is not an int8 layer.
    """
    # Not dtype=float32: transformers 5.23 then casts the biases of a bitsandbytes checkpoint but not its norms, and the
    # first forward fails. float16 around the int8 layers costs a mean KL of 2e-7.
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    complaints = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if complaints:
        raise SystemExit(f"error: '{folder}' does not load cleanly: {complaints}")
    int8 = {name for name, module in list_decoder_linears(model).items() if module.weight.dtype == torch.int8}
    if not expected_int8 <= int8:
        raise SystemExit(
            f"error: of the decoder's Linears in '{folder}' these are not int8: {sorted(expected_int8 - int8)}"
        )
    return model.eval()


def load_sequences(heldout: Path, n_sequences: int, length: int) -> torch.Tensor:
    """Return int64 [n_sequences, length], taken at equal distances from the row of token ids in `heldout`."""
    ids = load_file(heldout)["ids"].long()
    sequences = ids[: len(ids) // length * length].view(-1, length)
    return sequences[torch.arange(n_sequences) * len(sequences) // n_sequences]


class Fidelity:
    """Running sums over tokens of one model's errors against the reference."""

    def __init__(self) -> None:
        self._nll = self._kl = self._same_top = 0.0
        self._n_tokens = 0

    def add(self, log_probs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch: natural logs of probabilities [n, length, vocabulary] and the tokens that came [n, length]."""
        self._nll -= log_probs.gather(-1, targets[..., None]).sum(dtype=torch.float64).item()
        self._kl += (reference.exp() * (reference - log_probs)).sum(dtype=torch.float64).item()
        self._same_top += (log_probs.argmax(-1) == reference.argmax(-1)).sum().item()
        self._n_tokens += targets.numel()

    def summarize(self) -> dict[str, float]:
        return {
            "perplexity": math.exp(self._nll / self._n_tokens),
            "mean_kl": self._kl / self._n_tokens,
            "top1_agreement": self._same_top / self._n_tokens,
        }


@torch.inference_mode()
def compare(models: dict[str, PreTrainedModel], reference: str, sequences: torch.Tensor) -> dict[str, dict[str, float]]:
    """Run all models on the same `sequences` and return how each differs from the one named `reference`.

    Args:
        sequences: int64 [n, length]; each token but a sequence's first is predicted.

    Raises:
        SystemExit: a model's logits are not finite.
    """
    fidelity = {name: Fidelity() for name in models}
    for batch in torch.split(sequences, BATCH):
        log_probs = {name: model(batch).logits[:, :-1].float().log_softmax(-1) for name, model in models.items()}
        for name in models:
            if not log_probs[name].isfinite().all():
                raise SystemExit(f"error: the {name} model's output has NaN or infinity")
            fidelity[name].add(log_probs[name], log_probs[reference], batch[:, 1:])
    return {name: sums.summarize() for name, sums in fidelity.items()}


@torch.inference_mode()
def find_largest_input(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    """Return the largest |x| that any decoder Linear of `model` reads."""
    largest = [0.0]

    def record(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        largest.append(inputs[0].abs().max().item())

    hooks = [linear.register_forward_pre_hook(record) for linear in list_decoder_linears(model).values()]
    model(sequences)
    for hook in hooks:
        hook.remove()
    return max(largest)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge a converted checkpoint against its source.")
    parser.add_argument("source", type=Path, help="directory of the 16-bit checkpoint")
    parser.add_argument("converted", type=Path, help="directory of the int8 checkpoint")
    parser.add_argument("heldout", type=Path, help="safetensors file with the token ids under 'ids'")
    parser.add_argument("--runtime", choices=("bitsandbytes", "int8convert"), default="bitsandbytes")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=256, help="tokens of each sequence")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    # bitsandbytes warns that it computes in float16 on every forward; here that is part of what is measured.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sequences = load_sequences(options.heldout, options.sequences, options.length)
    source = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval()
    expected_int8 = set(list_decoder_linears(source))
    models = {"source": source}
    if options.runtime == "int8convert":
        import int8convert

        models["converted"] = int8convert.load(options.converted, dtype=torch.float32)
    else:
        models["naive"] = build_naive(source)
        models["converted"] = load_converted(options.converted, expected_int8)
    result: dict[str, object] = dict(compare(models, "source", sequences))
    result["n_predicted_tokens"] = sequences[:, 1:].numel()
    result["n_int8_layers"] = len(expected_int8)
    result["largest_activation"] = find_largest_input(source, sequences[:BATCH])
    ours = OUR_MODULES & {name.partition(".")[0] for name in sys.modules}
    if ours and options.runtime != "int8convert":
        raise SystemExit(f"error: this process must know nothing of int8convert, yet it imported {sorted(ours)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
