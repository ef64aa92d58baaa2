"""Methods of the slot `branch`: a file is a method, called what the file is called."""
