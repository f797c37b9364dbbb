"""From the headers of files to the tables of exposures and images."""
