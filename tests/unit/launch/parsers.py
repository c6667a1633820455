"""Reads manifests as Kubeflow's and SkyPilot's own packages do: `python parsers.py FILE...`, where these are installed.

Kubeflow's models drop what they do not know, so what was read is written again and has to be the file.
"""

import json
import sys
from pathlib import Path

import yaml


def train_job(values):
    """As `kubeflow-trainer-api` reads a TrainJob."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    return json.loads(json.dumps(TrainerV1alpha1TrainJob.from_dict(values).to_dict(), default=str))


def sky_task(values):
    """As SkyPilot reads a task; its answer is another form of it, so only what it refuses counts."""
    import sky
    from sky.utils import common_utils, schemas

    common_utils.validate_schema(values, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(values["resources"], schemas.get_resources_schema(), "resources: ")
    task = sky.Task.from_yaml_config(json.loads(json.dumps(values)))
    assert task.num_nodes == values["num_nodes"]
    assert task.run == values["run"]
    return values


def runtime(values):
    """As `kubeflow-trainer-api` reads a TrainingRuntime."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

    return json.loads(json.dumps(TrainerV1alpha1TrainingRuntime.from_dict(values).to_dict(), default=str))


READERS = {"TrainJob": train_job, "TrainingRuntime": runtime}

for path in sys.argv[1:]:
    for values in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")):
        read = READERS.get(values.get("kind"), sky_task)(values)
        assert read == values, f"{path}: {read} is not {values}"
        print(f"{path}: read by {READERS.get(values.get('kind'), sky_task).__name__}")
