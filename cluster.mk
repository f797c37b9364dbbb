# Tests on a real Slurm of four nodes, which the tests start on this machine as the user who runs
# them. They need the Debian packages slurm-wlm, slurmdbd, munge, mariadb-server and, for test-pbs,
# slurm-wlm-torque. Without these the tests are skipped, unless COADDFLOW_CLUSTER_TESTS=required.
#
# make test-slurm    a survey on Slurm, undisturbed and disturbed
# make test-pbs      the programs of profiles/pbs, alone and in front of that Slurm
# make test-cluster  both, on one cluster

.PHONY: test-slurm test-pbs test-cluster

SLURM_TESTS := tests/on_cluster/test_slurm.py
PBS_TESTS := tests/cluster/test_pbs_programs.py tests/on_cluster/test_pbs.py
# the copy of the survey for a test takes 0.1 GB: only those of failed tests are kept
CLUSTER_PYTEST := python -m pytest --override-ini tmp_path_retention_policy=failed

test-slurm: $(VENV)/.set-up-test
	$(RUN) $(CLUSTER_PYTEST) $(SLURM_TESTS) $(PYTEST_ARGS)

test-pbs: $(VENV)/.set-up-test
	$(RUN) $(CLUSTER_PYTEST) $(PBS_TESTS) $(PYTEST_ARGS)

test-cluster: $(VENV)/.set-up-test
	$(RUN) $(CLUSTER_PYTEST) --durations=10 $(SLURM_TESTS) $(PBS_TESTS) $(PYTEST_ARGS)
