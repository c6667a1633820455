"""Everything of fulltune that only a GPU can show, in one run: `make gpu-day`, or `python -m bench.gpu_day --help`."""
