"""All measurements that need a GPU, in one run: `make gpu-day`, or `python -m bench.gpu_day --help`."""
