"""The dataset on disk: manifests, the videos they list, and how a manifest is made."""
