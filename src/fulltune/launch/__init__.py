"""A recipe as a job for ssh, Slurm, Kubernetes or SkyPilot: a template for each, filled in for its user to edit."""
