"""Images to beton files and back: conversion, format, verification."""
