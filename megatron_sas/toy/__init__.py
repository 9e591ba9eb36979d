"""A seeded artificial language with gold trees and minimal pairs."""
