"""What a build writes and a run reads: the folder, its manifest, and how it comes into place."""
