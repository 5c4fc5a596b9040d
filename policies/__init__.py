"""Who decides what is applied to each image: learned, random, recorded, frozen and published sources."""
