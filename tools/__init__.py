"""Programs for those who build and publish kbatch. Not part of the package."""
