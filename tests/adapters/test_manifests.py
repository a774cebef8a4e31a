"""The manifests of `longctx launch` on Kubernetes, against the published schemas of TrainJob and JobSet."""

import pytest
import yaml

from tests.launch.cluster import golden_jobs

models = pytest.importorskip(
    "kubeflow_trainer_api.models", reason="needs the extra: pip install -e '.[test-kubernetes]'"
)


@pytest.mark.parametrize("recipe", golden_jobs.RECIPES)
@pytest.mark.parametrize(
    ("profile", "kind"), [("trainjob", "TrainerV1alpha1TrainJob"), ("jobset", "JobsetV1alpha2JobSet")]
)
def test_a_manifest_has_only_keys_of_its_schema(recipe, profile, kind):
    manifest = yaml.safe_load(golden_jobs.golden_file(profile, recipe).read_text())
    assert getattr(models, kind).from_dict(manifest).to_dict() == manifest
