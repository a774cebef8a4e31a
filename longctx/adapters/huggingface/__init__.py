"""Hugging Face models split along the sequence, exactly: `parallelize(model, mesh)`."""

from longctx.adapters.versions import Tested

TESTED = Tested("transformers", "transformers", oldest="5.23.0", newest="5.23", extra="huggingface")
TESTED.check()

from longctx.adapters.huggingface.parallelize import SequenceOutput, parallelize  # noqa: E402 - the version comes first

__all__ = ["TESTED", "SequenceOutput", "parallelize"]
