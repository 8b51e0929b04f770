//go:build never

// Package tools pins what the testbed builds and cannot name as a tool:
// e2e.test is made from a test package.
package tools

import _ "k8s.io/kubernetes/test/e2e"
