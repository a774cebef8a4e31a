"""Text from tokens that come one by one."""

from collections.abc import Sequence

from longctx.data.tokenizer import Tokenizer

CONTEXT = 8
"""Tokens of the prompt that are decoded with the first ones behind it: some tokenizers leave out a leading space."""
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Gives the text of each token as soon as later tokens cannot change it.

    A character may be several tokens, of bytes for instance, and is given when it is whole. Bytes that are no
    character appear as U+FFFD, as the tokenizer has them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """`prompt`: the tokens before the first, whose text is known."""
        self._tokenizer = tokenizer
        self._before = [int(token) for token in prompt[-CONTEXT:]]
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """What is certain now and was not before; often one token's text."""
        self._tokens.append(token)
        text = self._text()
        whole = text.rstrip(UNKNOWN)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(whole) == len(text):
            # Nothing is waiting: what follows is decoded behind the last tokens alone, whatever there was before.
            self._before, self._tokens, self._given = [*self._before, *self._tokens][-CONTEXT:], [], 0
        return new

    def end(self) -> str:
        """What was waiting for more tokens."""
        rest = self._text()[self._given :]
        self._before, self._tokens, self._given = [*self._before, *self._tokens][-CONTEXT:], [], 0
        return rest

    def _text(self) -> str:
        """Of the tokens that came, behind those before them."""
        decode = self._tokenizer.decode
        return decode([*self._before, *self._tokens])[len(decode(self._before)) :]
