"""From a folder of volumes to a plan: check every file, take the fingerprint, and choose spacing, patch and network."""
