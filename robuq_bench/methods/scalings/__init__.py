"""Methods of the slot `scaling`: a file is a method, called what the file is called."""
