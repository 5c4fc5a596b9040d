"""Images and labels from arrays, class folders and downloads."""
