"""Prompts with a number hidden at a depth of a long text, and a question at the end.

- `passkey`: five short sentences over and over (Mohtashami and Jaggi 2023, Landmark Attention). The
  number always has five digits, in place of the paper's 1 to 5.
- `needle`: documents of the corpus (Hsieh et al. 2024, RULER, the single needle with a number).

A prompt of length L feeds exactly L tokens and predicts L tokens. The last predictions, the answer,
count. Lines are tokenized separately. The text around the hidden line is cut to fit, and depth is
the fraction of the text before the hidden line. At every length and depth, a trial has the same
number and begins with the same text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from dape.data.shards import Corpus
from dape.data.tokenizer import encoder, serialize
from dape.errors import UserError
from dape.evaluate.refusal import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokens = Int[np.ndarray, " tokens"]
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
WORDS = ("anchor", "bridge", "candle", "forest", "harbour", "island", "kettle", "ladder", "mirror")


@dataclass(frozen=True, slots=True)
class Task:
    """The lines of a prompt; `{number}` has `digits` digits, and `{word}` is from `WORDS`."""

    opening: str
    hidden: str
    question: str
    digits: int


TASKS = {
    "passkey": Task(
        opening="There is an important info hidden inside a lot of irrelevant text. Find it and "
        "memorize them. I will quiz you about the important information there.\n",
        hidden="\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
        question="\nWhat is the pass key? The pass key is",
        digits=5,
    ),
    "needle": Task(
        opening="A special magic number is hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the number afterwards.\n",
        hidden="\nOne of the special magic numbers for {word} is: {number}.\n",
        question="\nWhat is the special magic number for {word} mentioned in the provided text? "
        "The special magic number for {word} mentioned in the provided text is",
        digits=7,
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of a prompt; the last `answer` tokens must be predicted."""

    tokens: Tokens
    answer: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of a task in the tokens of a model.

    The answer is tokenized together with the question. `start` holds the tokens at the beginning of
    every text, as for Llama. `around(n, generator)` returns n tokens around the hidden line.
    """

    task: Task
    encode: Callable[[str], Tokens]
    start: Tokens
    around: Callable[[int, np.random.Generator], Tokens]

    def make(self, length: int, depth: float, trial: int, seed: int) -> Prompt:
        """Return a prompt of `length` input tokens.

        Raises:
            Refused: if the lines of the prompt are longer.
            UserError: if the text is too short.
        """
        generator = np.random.default_rng([seed, trial])
        least = 10 ** (self.task.digits - 1)
        number = int(generator.integers(least, 10 * least))
        word = WORDS[generator.integers(len(WORDS))]
        task = self.task
        opening, hidden, question, asked = (
            self.encode(line.format(number=number, word=word)).astype(np.int64)
            for line in (task.opening, task.hidden, task.question, task.question + " {number}")
        )
        fixed = sum(map(len, (self.start, opening, hidden, asked)))
        room = length + 1 - fixed
        if room < 0:
            raise Refused(f"the prompt alone has {fixed - 1} tokens")
        before, after = np.split(self.around(room, generator), [round(depth * room)])
        parts = (self.start, opening, before, hidden, after, asked)
        return Prompt(np.concatenate(parts), answer=len(asked) - len(question))


def passkey(tokenizer: "PreTrainedTokenizerFast") -> Prompts:
    """Return the prompts of the task `passkey`."""
    encode = encoder(serialize(tokenizer))
    filler = encode(FILLER).astype(np.int64)
    return Prompts(
        TASKS["passkey"], encode, _start(tokenizer), lambda count, _: np.resize(filler, count)
    )


def needle(tokenizer: "PreTrainedTokenizerFast", corpus: Corpus, split: str) -> Prompts:
    """Return the prompts of the task `needle`, hidden in documents of a split."""
    part = corpus.split(split)

    def around(count: int, generator: np.random.Generator) -> Tokens:
        first = int(generator.integers(part.num_documents))
        numbers = (
            number % part.num_documents for number in range(first, first + part.num_documents)
        )
        text = _joined((part.document(number)[:-1] for number in numbers), count)
        if len(text) < count:
            raise UserError(
                f"a needle needs {count:,} tokens of surrounding text, and split {split!r} of "
                f"{corpus.folder} has {len(text):,}; ask for shorter lengths"
            )
        return text[:count]

    return Prompts(TASKS["needle"], encoder(serialize(tokenizer)), _start(tokenizer), around)


def _joined(documents: Iterable[Tokens], count: int) -> Tokens:
    """Return documents in order, up to `count` tokens."""
    pieces, tokens = [np.empty(0, np.int64)], 0
    for document in documents:
        if tokens >= count:
            break
        pieces.append(document)
        tokens += len(document)
    return np.concatenate(pieces)


def _start(tokenizer: "PreTrainedTokenizerFast") -> Tokens:
    added = tokenizer("").input_ids
    return np.array([token for token in added if token == tokenizer.bos_token_id], np.int64)
