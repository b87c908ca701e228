"""Hydra's configuration tree; a package so that an installed wheel finds it as `pkg://bestiary.conf`."""
