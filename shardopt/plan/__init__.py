"""Plans and predicts Muon's exchange for a model and a mesh, without either: `python -m shardopt.plan --help`."""
