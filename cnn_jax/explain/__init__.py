"""Why a network decides as it does: maps of images, features, and what holds them to account."""
