"""Recipes around shardopt: a pretraining job for torchrun, a quickstart, and the scripts that start them."""
