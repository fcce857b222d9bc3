"""Documents in, packed token shards out: `python -m data_prep prepare CONFIG.yaml`."""
