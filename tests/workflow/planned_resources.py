"""Write what the jobs of surveys ask Snakemake for, into ``asked.json`` in the folder of each.

    python planned_resources.py SNAKEFILE CORES FOLDER...

As on a cluster, but only planned. Each survey has a process of its own, since the Snakefile changes
parts of Snakemake.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import yaml
from snakemake.api import SnakemakeApi
from snakemake.resources import GroupResources
from snakemake.settings.types import ConfigSettings, OutputSettings, ResourceSettings
from snakemake.workflow import Workflow


def as_on_slurm(workflow):
    """Return the executor of the dry run under the name of one of Slurm's."""
    return dataclasses.replace(workflow._executor_plugin, _name="slurm-jobstep")


def planned(snakefile, cores):
    """Return the job graph of the survey in the working folder."""
    if yaml.safe_load(Path("config.yaml").read_text()).get("parallel", {}).get("backend") == "mpi":
        Workflow.executor_plugin = property(as_on_slurm)
    with SnakemakeApi(OutputSettings(dryrun=True)) as api:
        run = api.workflow(
            resource_settings=ResourceSettings(cores=cores, nodes=10),
            config_settings=ConfigSettings(configfiles=[Path("config.yaml")]),
            snakefile=Path(snakefile),
        )
        run.dag().execute_workflow(executor="cluster-generic", pseudo_executor="dryrun")
        return run._workflow.dag


def asked(dag):
    """Return what all jobs ask for, and the groups they are sent in.

    Rule or group; memory, time limit, cores, and of workers on several nodes tasks and the memory
    of each.
    """
    jobs = [job for job in dag.jobs if job.rule.name != "all"]
    # of a group that is planned only, Snakemake adds the memory of steps in turn
    groups = {
        group: GroupResources.basic_layered(group.toposorted, group.global_resources, False)
        for group in set(dag._group.values())
    }
    return {
        "jobs": [[job.rule.name, *_amounts(job.resources)] for job in jobs],
        "groups": [[group.name, *_amounts(amounts)] for group, amounts in groups.items()],
    }


def _amounts(resources):
    names = ("mem_mb", "runtime", "_cores", "tasks", "mem_mb_per_cpu")
    return [resources.get(name) for name in names]


if __name__ == "__main__":
    for folder in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            Path("asked.json").write_text(json.dumps(asked(planned(sys.argv[1], int(sys.argv[2])))))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{folder} failed")
