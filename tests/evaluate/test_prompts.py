"""Prompts against the literature's text, spelled out here, and against the corpus's own files."""

import re

import pytest
from tokenizers.processors import TemplateProcessing

from dape.data.shards import Corpus
from dape.data.tokenizer import byte
from dape.errors import UserError
from dape.evaluate.prompts import needle, passkey
from dape.evaluate.refusal import Refused
from folders import learned_tokenizer, prepare, spaced_tokenizer

LANDMARK = (  # Mohtashami and Jaggi 2023, as their code writes it
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
    "{prefix}\n"
    "The pass key is {key}. Remember it. {key} is the pass key.\n"
    "{suffix}\n"
    "What is the pass key? The pass key is {key}"
)
GARBAGE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
RULER = re.compile(  # Hsieh et al. 2024, task niah_single_2
    rb"A special magic number is hidden within the following text. Make sure to memorize it. I "
    rb"will quiz you about the number afterwards.\n"
    rb"(?P<prefix>.*)\nOne of the special magic numbers for (?P<word>\w+) is: (?P<key>\d{7}).\n"
    rb"(?P<suffix>.*)\nWhat is the special magic number for (?P=word) mentioned in the provided "
    rb"text\? The special magic number for (?P=word) mentioned in the provided text is (?P=key)",
    re.DOTALL,
)


def text(prompt):
    return bytes(prompt.tokens.tolist()).decode()


@pytest.mark.parametrize(
    ("length", "depth"), [(300, 0.0), (300, 0.5), (301, 1.0), (1000, 0.25), (4096, 0.75)]
)
def test_a_passkey_prompt_is_the_literatures_and_exactly_as_long_as_asked(length, depth):
    prompt = passkey(byte()).make(length, depth, trial=3, seed=0)
    key = text(prompt)[-5:]
    assert 10_000 <= int(key) < 100_000
    room = length + 1 - len(LANDMARK.format(prefix="", suffix="", key=key))
    around = (GARBAGE * 100)[:room]
    cut = round(depth * room)
    assert text(prompt) == LANDMARK.format(prefix=around[:cut], suffix=around[cut:], key=key)
    assert len(prompt.tokens) == length + 1  # a prompt feeds all but the last
    assert prompt.answer == len(" 12345")


def test_a_trial_hides_the_same_number_everywhere_and_another_seed_another():
    prompts = passkey(byte())
    keys = {
        (trial, seed): {
            text(prompts.make(length, depth, trial, seed))[-5:]
            for length in (300, 500)
            for depth in (0.0, 0.5)
        }
        for trial in range(3)
        for seed in range(2)
    }
    assert all(len(each) == 1 for each in keys.values())
    assert len(set.union(*keys.values())) == 6


def test_a_needle_lies_in_the_documents_of_the_corpus_one_after_the_other(tmp_path):
    corpus = prepare(tmp_path, sizes=[300, 5, 200, 400])
    documents = [file.read_bytes() for file in sorted((tmp_path / "text" / "test").iterdir())]
    orders = [b"".join(documents[n:] + documents[:n]) for n in range(len(documents))]
    prompts = needle(byte(), Corpus(corpus), "test")
    starts = set()
    for trial in range(12):
        for length in (1000, 700, 500):
            prompt = prompts.make(length, 0.3, trial, seed=1)
            assert (len(prompt.tokens), prompt.answer) == (length + 1, 8)
            found = RULER.fullmatch(bytes(prompt.tokens.tolist()))
            around = found["prefix"] + found["suffix"]
            assert len(found["prefix"]) == round(0.3 * len(around))
            (start,) = [n for n, order in enumerate(orders) if order.startswith(around)]
            starts.add((trial, start, found["key"]))
    assert len(starts) == 12  # the same text and number at every length
    assert len({start for _, start, _ in starts}) > 1


def test_text_that_does_not_suffice_and_prompts_that_do_not_fit_are_told(tmp_path):
    corpus = Corpus(prepare(tmp_path, sizes=[300, 200]))
    with pytest.raises(UserError, match=r"split 'test' of .* has 5\d\d; ask for shorter lengths"):
        needle(byte(), corpus, "test").make(2000, 0.5, trial=0, seed=0)
    least = len(LANDMARK.format(prefix="", suffix="", key=12345)) - 1
    assert len(passkey(byte()).make(least, 0.5, trial=0, seed=0).tokens) == least + 1
    with pytest.raises(Refused, match=f"the prompt alone has {least} tokens"):
        passkey(byte()).make(least - 1, 0.5, trial=0, seed=0)


def test_a_text_begins_as_the_tokenizer_begins_texts():
    tokenizer = learned_tokenizer()
    plain = passkey(tokenizer).make(400, 0.5, trial=0, seed=0)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A !",
        special_tokens=[
            ("<|endoftext|>", tokenizer.bos_token_id),
            ("!", tokenizer.convert_tokens_to_ids("!")),  # the end of a text
        ],
    )
    begun = passkey(tokenizer).make(400, 0.5, trial=0, seed=0)
    assert begun.tokens[0] == tokenizer.bos_token_id != plain.tokens[0]
    assert begun.tokens[1:50].tolist() == plain.tokens[:49].tolist()
    assert len(begun.tokens) == len(plain.tokens)
    assert tokenizer.decode(begun.tokens[-begun.answer :]).strip().isdigit()


def test_an_answer_goes_on_from_its_question_where_texts_begin_with_a_space():
    """As Llama 2 and Mistral tokenize: alone, " 12345" would get a second space."""
    tokenizer = spaced_tokenizer()
    prompt = passkey(tokenizer).make(400, 0.5, trial=0, seed=0)
    pieces = tokenizer.convert_ids_to_tokens(prompt.tokens[-prompt.answer - 1 :].tolist())
    number = tokenizer.decode(prompt.tokens)[-5:]
    assert pieces == ["<0x73>", "\u2581", *(f"<0x{ord(digit):02X}>" for digit in number)]
