"""`int8convert.generate`: the tokens are the model's own, and what is told of them is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.errors import CorruptFileError, DeviceError, PromptError, SourceError
from tests.tools.language_models import CHAT_TEMPLATE, build_tokenizer, language_model, save_int8, save_reciter
from tests.tools.tiny_models import edit_config

RECITED = "né 🦙[b]!"
"""One token for each of its bytes but two, and markup."""

PROMPTS = ["The cat", "A quantized model with fewer bits and", "🍏", "jumps over the lazy dog, and"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_int8("llama", tmp_path_factory.mktemp("llama") / "int8", build_tokenizer())


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_int8("llama", tmp_path_factory.mktemp("chat") / "int8", build_tokenizer(CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reciter(RECITED, tmp_path_factory.mktemp("reciter"), build_tokenizer())


def copy_of(checkpoint: Path, directory: Path) -> Path:
    """A copy to be changed; the weights are a link."""
    directory.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            (directory / path.name).symlink_to(path)
        elif path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def own_text(checkpoint: Path, prompt: str, n_tokens: int = 12, **options: Any) -> str:
    """What transformers makes of the model that `int8convert.load` gives."""
    model, tokenizer = int8convert.load(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0, **options)[0]
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(ids[begin:], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bloom", "t5"])
def test_text_is_that_of_the_models_own_generate(name: str, tmp_path: Path) -> None:
    checkpoint = save_int8(name, tmp_path / "int8", build_tokenizer())
    text = own_text(checkpoint, PROMPTS[0])
    report = int8convert.generate(checkpoint, PROMPTS[:1], max_new_tokens=12)
    assert report.texts == (text,) and len(text) > 5


def test_recited_text_ends_by_itself(reciter: Path) -> None:
    report = int8convert.generate(reciter, ["n"], max_new_tokens=40)
    assert report.texts == (RECITED[1:],) and report.is_complete == (True,)
    assert (report.n_prompt_tokens, report.n_new_tokens) == (1, 11)


def test_pieces_joined_are_the_text_and_come_in_whole_characters(reciter: Path) -> None:
    pieces: list[str] = []
    report = int8convert.generate(reciter, ["n"], max_new_tokens=40, on_text=pieces.append)
    assert pieces == ["é", " ", "🦙", "[", "b", "]", "!"] and "".join(pieces) == report.texts[0]


def test_character_that_is_cut_off_is_passed_on_as_the_text_has_it(reciter: Path) -> None:
    pieces: list[str] = []
    report = int8convert.generate(reciter, ["n"], max_new_tokens=4, on_text=pieces.append)
    assert report.texts == ("é \N{REPLACEMENT CHARACTER}",) and "".join(pieces) == report.texts[0]
    assert report.is_complete == (False,) and report.n_new_tokens == report.max_new_tokens == 4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_of_any_text_joined_are_the_text(prompt: str, llama: Path) -> None:
    """A random model writes bytes that are no characters, too."""
    pieces: list[str] = []
    sampling = int8convert.Sampling(temperature=2.0, seed=len(prompt))
    report = int8convert.generate(llama, [prompt], on_text=pieces.append, sampling=sampling, max_new_tokens=48)
    assert "".join(pieces) == report.texts[0] and len(pieces) > 10


@pytest.mark.parametrize("mode", ["none", None])
def test_batch_says_what_each_prompt_alone_gets(mode: str | None, reciter: Path, llama: Path) -> None:
    """In a batch of unequal lengths; dynamic outliers may depend on neighbours, which the reciter's words do not."""
    checkpoint, prompts = (llama, PROMPTS) if mode else (reciter, ["n", "né 🦙", "[b"])
    options: dict[str, Any] = {"max_new_tokens": 12, "outliers": mode}
    together = int8convert.generate(checkpoint, prompts, **options)
    alone = [int8convert.generate(checkpoint, [prompt], **options) for prompt in prompts]
    assert together.texts == tuple(report.texts[0] for report in alone) and len(set(together.texts)) == len(prompts)
    assert together.n_new_tokens == sum(report.n_new_tokens for report in alone)
    assert together.n_prompt_tokens == sum(report.n_prompt_tokens for report in alone)
    assert together.is_complete == tuple(report.is_complete[0] for report in alone)


@pytest.mark.parametrize("change", [{"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_batch_needs_no_padding_token(change: dict[str, None], reciter: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(reciter, tmp_path / "copy")
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    report = int8convert.generate(checkpoint, ["n", "né 🦙"], max_new_tokens=40)
    assert [text.removesuffix("</s>") for text in report.texts] == [RECITED[1:], "[b]!"]
    assert report.n_new_tokens == 11 + 5


def test_seed_makes_drawn_text_reproducible(llama: Path) -> None:
    def text(**options: Any) -> str:
        sampling = int8convert.Sampling(**options)
        return int8convert.generate(llama, PROMPTS[:1], max_new_tokens=12, sampling=sampling).texts[0]

    drawn = {seed: text(temperature=1.5, seed=seed) for seed in (1, 2)}
    assert drawn[1] == text(temperature=1.5, seed=1) != drawn[2]
    torch.manual_seed(1)
    unseeded = text(temperature=1.5)
    assert unseeded != text(temperature=1.5)
    likeliest = text(seed=1)
    assert likeliest == text(seed=2) != drawn[1]
    assert text(temperature=1.5, top_k=1) == text(temperature=1.5, top_p=0.0) == text(temperature=1e-6) == likeliest


def test_generation_config_of_the_checkpoint_does_not_choose_otherwise(llama: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(llama, tmp_path / "copy")
    says = {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "num_beams": 4, "num_return_sequences": 2}
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **says, "return_dict_in_generate": True}))
    pieces: list[str] = []
    report = int8convert.generate(checkpoint, PROMPTS[:1], max_new_tokens=12, on_text=pieces.append)
    assert report.texts == int8convert.generate(llama, PROMPTS[:1], max_new_tokens=12).texts == ("".join(pieces),)


def test_chat_template_is_used_where_there_is_one(chat: Path) -> None:
    rendered = "<s>user: The cat</s><s>assistant:"
    expected = int8convert.generate(chat, [rendered], max_new_tokens=12, chat=False)
    bare = int8convert.generate(chat, ["The cat"], max_new_tokens=12, chat=False)
    for choice in (None, True):
        report = int8convert.generate(chat, ["The cat"], max_new_tokens=12, chat=choice)
        assert report.texts == expected.texts != bare.texts and report.n_prompt_tokens == expected.n_prompt_tokens


def test_system_message_comes_first(chat: Path) -> None:
    rendered = "<s>system: be brief</s><s>user: The cat</s><s>assistant:"
    expected = int8convert.generate(chat, [rendered, "x"], max_new_tokens=12, chat=False, outliers="none").texts[0]
    found = int8convert.generate(chat, ["The cat", "x"], max_new_tokens=12, system="be brief", outliers="none")
    assert found.texts[0] == expected


def test_tokenizer_that_gives_token_types_gives_the_same_text(chat: Path, tmp_path: Path) -> None:
    """As BERT's do; a model that knows none refuses them."""
    checkpoint = copy_of(chat, tmp_path / "copy")
    path = checkpoint / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    for choice in (True, False):
        expected = int8convert.generate(chat, ["The cat"], max_new_tokens=12, chat=choice)
        assert int8convert.generate(checkpoint, ["The cat"], max_new_tokens=12, chat=choice).texts == expected.texts


def test_text_stops_where_the_model_has_no_more_positions(tmp_path: Path) -> None:
    checkpoint = save_int8("opt", tmp_path / "int8", build_tokenizer())
    report = int8convert.generate(checkpoint, ["The cat sat on the mat"], max_new_tokens=1000)
    assert report.n_prompt_tokens == 6 and report.n_new_tokens == report.max_new_tokens == 58
    assert report.is_complete == (False,)


def test_encoder_and_decoder_have_positions_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 64))}
    config = transformers.BartConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        max_position_embeddings=16,
        decoder_start_token_id=2,
        eos_token_id=2,
        forced_eos_token_id=None,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        **sizes,
    )
    model = int8convert.quantize_(transformers.BartForConditionalGeneration(config).eval())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = int8convert.generate(tmp_path, ["abcdefghijklmno"], max_new_tokens=1000)
    assert 10 < report.n_prompt_tokens <= 16 and report.max_new_tokens == 16
    with pytest.raises(PromptError, match=r"a prompt of 17 tokens leaves no room: the model has 16 positions"):
        int8convert.generate(tmp_path, ["!" * 17])


def test_report_says_what_it_took(llama: Path) -> None:
    report = int8convert.generate(llama, PROMPTS[:2], max_new_tokens=6)
    tokenizer = build_tokenizer()
    assert report.n_prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[:2])
    assert report.n_new_tokens == 12 and report.device == "cpu"
    assert report.load_s > 0 and report.first_token_s > 0 and report.decode_tokens_per_s > 0
    assert 50e6 < report.peak_memory_bytes < 50e9
    one = int8convert.generate(llama, PROMPTS[:1], max_new_tokens=1)
    assert (one.n_new_tokens, one.decode_tokens_per_s) == (1, 0.0)


# One test for each error.


def test_prompt_too_long(tmp_path: Path) -> None:
    checkpoint = save_int8("opt", tmp_path / "int8", build_tokenizer())
    with pytest.raises(PromptError, match=r"a prompt of 64 tokens leaves no room: the model has 64 positions"):
        int8convert.generate(checkpoint, ["!" * 64])


def test_prompt_without_tokens(llama: Path) -> None:
    for prompts in ([""], ["The cat", ""]):
        with pytest.raises(PromptError, match="a prompt is empty"):
            int8convert.generate(llama, prompts)


def test_chat_without_a_template(llama: Path) -> None:
    with pytest.raises(PromptError, match="no chat template") as caught:
        int8convert.generate(llama, PROMPTS[:1], chat=True)
    assert "leave --chat out" in caught.value.hint


def test_system_message_without_a_chat(llama: Path, chat: Path) -> None:
    with pytest.raises(PromptError, match="needs a chat, and the tokenizer has no chat template"):
        int8convert.generate(llama, PROMPTS[:1], system="be brief")
    with pytest.raises(PromptError, match="needs a chat, and chat is off"):
        int8convert.generate(chat, PROMPTS[:1], system="be brief", chat=False)


def test_template_that_refuses_a_message(chat: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(chat, tmp_path / "copy")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    (checkpoint / "chat_template.jinja").write_text(refusing)
    assert int8convert.generate(checkpoint, ["x"], max_new_tokens=1).n_new_tokens == 1
    with pytest.raises(PromptError, match="refuses the messages: TemplateError: no system role") as caught:
        int8convert.generate(checkpoint, ["x"], system="be brief")
    assert caught.value.hint == "leave --system out"


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere' is no directory, and no repository within reach"):
        int8convert.generate(tmp_path / "nowhere", PROMPTS[:1])


def test_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        int8convert.generate(tmp_path, PROMPTS[:1])


def test_source_in_16_bits(llama: Path) -> None:
    with pytest.raises(SourceError, match="is no int8 checkpoint"):
        int8convert.generate(llama.with_name("int8-source"), PROMPTS[:1])


def test_checkpoint_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(llama, tmp_path / "copy")
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match="has no tokenizer that transformers can read") as caught:
        int8convert.generate(checkpoint, PROMPTS[:1])
    assert "copy the files" in caught.value.hint


def test_weights_that_are_missing(llama: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(llama, tmp_path / "copy")
    edit_config(checkpoint, num_hidden_layers=3)
    with pytest.raises(CorruptFileError, match=r"has no 'model\.layers\.2"):
        int8convert.generate(checkpoint, PROMPTS[:1])


def test_model_that_writes_no_text(tmp_path: Path, tokenizer: Any) -> None:
    int8convert.quantize_(language_model("llama", tokenizer).model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="is a LlamaModel, which writes no text"):
        int8convert.generate(tmp_path, PROMPTS[:1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_gpu_that_is_not_there(device: str, llama: Path) -> None:
    with pytest.raises(DeviceError, match=f"--device {device}: torch finds no usable GPU"):
        int8convert.generate(llama, PROMPTS[:1], device=device)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", "cudas"])
def test_device_of_another_kind(device: str, llama: Path) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        int8convert.generate(llama, PROMPTS[:1], device=device)


def test_prompts_that_are_no_list_of_prompts(llama: Path) -> None:
    wrong: Iterator[dict[str, Any]] = iter(
        [{"prompts": []}, {"prompts": "The cat"}, {"prompts": PROMPTS, "on_text": print}]
    )
    for arguments in wrong:
        with pytest.raises(ValueError, match="prompts must be a list"):
            int8convert.generate(llama, **arguments)


def test_outliers_that_are_not_stored(llama: Path) -> None:
    with pytest.raises(SourceError, match="needs stored columns"):
        int8convert.generate(llama, PROMPTS[:1], outliers="static")
