"""Byte-level BPE tokenizers as RoBERTa and ModernBERT have them, trained on a few sentences."""

from __future__ import annotations

import json

from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

TEXT = [
    "The dogs that barked at the cat ran away, and the cats didn't.",
    "Der Bär aß süße Äpfel; das naïve Café war größer.",
    "Unbelievable: the barking dogs ran — the cat ran faster.",
] * 20


def _trained(specials: list[str]) -> Tokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXT, vocab_size=400, min_frequency=2, special_tokens=specials, show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())


def roberta_tokenizer(**options) -> RobertaTokenizerFast:
    """`<s> … </s>`; `add_prefix_space=False` by default, as published."""
    model = json.loads(_trained(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).to_str())["model"]
    return RobertaTokenizerFast(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **options)


def modernbert_tokenizer(trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """`[CLS] … [SEP]`, NFC; without `trim_offsets` a token's span begins at the space before the word."""
    tokenizer = _trained(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), template])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


BYTE_LEVEL = {
    "roberta": roberta_tokenizer,
    "roberta with a space before": lambda: roberta_tokenizer(add_prefix_space=True),
    "modernbert": modernbert_tokenizer,
    "modernbert, spans with spaces": lambda: modernbert_tokenizer(trim_offsets=False),
}
WORDS = ["The", "dogs", "did", "n't", ",", "—", "naïve", "Äpfel", "😀"]


def words_by_hand(tokens: list[str]) -> list[int]:
    """The word of every token of `WORDS` with spaces between: Ġ is a space."""
    words, word = [], -1
    for place, token in enumerate(tokens):
        word += token.startswith("Ġ") or place == 0
        words.append(word)
    assert word == len(WORDS) - 1
    return words
