"""Jobs for launchers that people run already: ssh, Slurm, Kubernetes, SkyPilot. Each module writes one kind of file."""
