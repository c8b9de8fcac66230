// SPDX-License-Identifier: Apache-2.0

// Package storage is Kubernetes' own tests of CSI drivers, and nothing else of its end-to-end tests: what
// k8s.io/kubernetes/test/e2e/storage/external makes of the definition of a driver (-storage.testdriver).
package storage

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
	_ "k8s.io/kubernetes/test/e2e/storage/external"
)

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	framework.AfterReadingAllFlags(&framework.TestContext)
	os.Exit(m.Run())
}

// Those that were not begun are many, and of other parts of Kubernetes; the framework also goes through all once without running them.
var _ = ginkgo.ReportAfterEach(func(report ginkgo.SpecReport) {
	if report.RunTime > 0 {
		pattern := strings.Join(report.ContainerHierarchyTexts[1:], " ")
		fmt.Printf("\ntest: %s after %s: %s %s\n", report.State, report.RunTime.Round(time.Second), pattern, report.LeafNodeText)
	}
})

func TestStorage(t *testing.T) {
	gomega.RegisterFailHandler(framework.Fail)
	suite, reporter := framework.CreateGinkgoConfig()
	ginkgo.RunSpecs(t, "storage", suite, reporter)
}
