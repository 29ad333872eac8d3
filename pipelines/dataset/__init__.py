"""The dataset on disk: the manifest, the videos it names, and how a manifest is made."""
