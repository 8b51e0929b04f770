{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{- define "bpf-dataplane.labels" -}}
app.kubernetes.io/name: bpf-dataplane
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "bpf-dataplane.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Environment that leads around the API server's Service, where a real address is given. */}}
{{- define "bpf-dataplane.apiServerEnv" -}}
{{- with .Values.apiServer }}{{ if .host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .host | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .port | quote }}
{{- end }}{{ end }}
{{- end }}

{{/* What operator and hooks have in common: no privilege, the node's network (they must work while
Services and cluster DNS do not), a writable /tmp and nothing else. */}}
{{- define "bpf-dataplane.pod" -}}
hostNetwork: true
dnsPolicy: Default
priorityClassName: {{ .Values.operator.priorityClassName }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {}
{{- end }}

{{- define "bpf-dataplane.container" -}}
image: {{ include "bpf-dataplane.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end }}

{{/* A hook's Job. Called with: root, name (of the Job and its ServiceAccount), events, weight, command, deadline, env. */}}
{{- define "bpf-dataplane.hookJob" -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "bpf-dataplane.labels" .root | nindent 4 }}
    app.kubernetes.io/component: hook
  annotations:
    helm.sh/hook: {{ .events }}
    helm.sh/hook-weight: "0"
    # A Job that failed stays, for its log.
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  backoffLimit: 4
  activeDeadlineSeconds: {{ .deadline }}
  template:
    metadata:
      labels: {{- include "bpf-dataplane.labels" .root | nindent 8 }}
        app.kubernetes.io/component: hook
    spec: {{- include "bpf-dataplane.pod" .root | nindent 6 }}
      restartPolicy: Never
      serviceAccountName: {{ .name }}
      containers:
        - name: hook
          command: [bpfdp-operator, hook, {{ .command }}]
          {{- include "bpf-dataplane.container" .root | nindent 10 }}
          env:
            - name: POD_NAMESPACE
              valueFrom:
                fieldRef:
                  fieldPath: metadata.namespace
            {{- with include "bpf-dataplane.apiServerEnv" .root }}{{ . | trim | nindent 12 }}{{ end }}
            {{- with .env }}{{ toYaml . | nindent 12 }}{{ end }}
{{- end }}

{{- define "bpf-dataplane.hookMeta" -}}
labels: {{- include "bpf-dataplane.labels" .root | nindent 2 }}
  app.kubernetes.io/component: hook
annotations:
  helm.sh/hook: {{ .events }}
  helm.sh/hook-weight: "-10"
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
