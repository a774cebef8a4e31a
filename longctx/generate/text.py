"""Incremental detokenisation: the text of tokens that arrive one by one."""

from collections.abc import Sequence

from longctx.data.tokenizer import Tokenizer

CONTEXT = 8
"""Preceding tokens that are decoded together with new ones: some tokenizers drop a leading space."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Returns the text of each token as soon as later tokens cannot change it.

    A character may span several tokens, as with byte tokens, and is returned when it is complete. Invalid UTF-8 becomes
    U+FFFD, as the tokenizer decodes it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """`prompt`: the tokens before the first one, whose text is not returned."""
        self._tokenizer = tokenizer
        self._before = [int(token) for token in prompt[-CONTEXT:]]
        self._tokens: list[int] = []
        self._returned = 0

    def add(self, token: int) -> str:
        """Add a token; return the text that is now final and was not before."""
        self._tokens.append(token)
        text = self._text()
        complete = text.rstrip(REPLACEMENT)
        new = complete[self._returned :]
        self._returned = max(self._returned, len(complete))
        if len(complete) == len(text):
            # Nothing is pending: later tokens are decoded after only the last few.
            self._before, self._tokens, self._returned = [*self._before, *self._tokens][-CONTEXT:], [], 0
        return new

    def end(self) -> str:
        """Return the pending text, after the last token."""
        rest = self._text()[self._returned :]
        self._before, self._tokens, self._returned = [*self._before, *self._tokens][-CONTEXT:], [], 0
        return rest

    def _text(self) -> str:
        """Decode the pending tokens in the context of those before them."""
        decode = self._tokenizer.decode
        return decode([*self._before, *self._tokens])[len(decode(self._before)) :]
