"""Hugging Face adapter: exact sequence parallelism for transformers models, `parallelize(model, mesh)`."""

from longctx.adapters.versions import TestedVersions

TESTED = TestedVersions("transformers", "transformers", oldest="5.23.0", newest="5.23", extra="huggingface")
TESTED.check()

from longctx.adapters.huggingface.parallelize import SequenceOutput, parallelize  # noqa: E402 - the version is checked first

__all__ = ["TESTED", "SequenceOutput", "parallelize"]
