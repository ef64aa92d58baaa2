"""Methods of the slot `activation`: a file is a method, called what the file is called."""
