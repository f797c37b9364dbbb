# Tests on a real Slurm of four nodes, which the tests bring up on this machine as the user who
# runs them. They need the Debian packages slurm-wlm, slurmdbd, munge, mariadb-server and, for
# test-pbs, slurm-wlm-torque; where these are missing they say so and skip.
#
# make test-slurm   a survey on Slurm, left in peace and disturbed
# make test-pbs     the programs of profiles/pbs, alone and in front of that Slurm

.PHONY: test-slurm test-pbs

test-slurm: $(VENV)/.set-up-test
	$(RUN) python -m pytest tests/cluster/test_slurm.py $(PYTEST_ARGS)

test-pbs: $(VENV)/.set-up-test
	$(RUN) python -m pytest tests/test_pbs_programs.py tests/cluster/test_pbs.py $(PYTEST_ARGS)
