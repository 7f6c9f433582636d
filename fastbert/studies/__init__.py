"""Studies that consist of many training jobs: an engine that runs the jobs, ablations and sweeps."""
