"""Documents in, packed token shards out: `python -m data_prep prepare CONFIG.yaml`.

    sources ──work_list──▶ units ──documents──▶ texts ──tokenizing──▶ ids ──packing──▶ rows ──shards──▶ files

`worker` does this for one unit, `pool` for many, and `prepare` from the configuration to the manifest.
"""
