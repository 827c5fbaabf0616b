{{/* Parts of pods that a trainer's nodes have in common. Argument: [root,] trainer (values). */}}

{{/* Where a pod may be. */}}
{{- define "gradwire.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .tolerations .gpu.count }}
tolerations:
  {{- with .tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if .gpu.count }}
  - {key: {{ .gpu.resourceName }}, operator: Exists, effect: NoSchedule}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What a container gets. */}}
{{- define "gradwire.trainerResources" -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- if .gpu.count -}}
{{- $_ := set $limits .gpu.resourceName (int .gpu.count) -}}
{{- end -}}
{{- if .rdma.count -}}
{{- $_ := set $limits .rdma.resourceName (int .rdma.count) -}}
{{- end -}}
{{- with .resources.requests }}
requests:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $limits }}
limits:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Ranks of one machine talk through /dev/shm, which a runtime makes 64 MiB large. */}}
{{- define "gradwire.sharedMemoryMount" -}}
{{- if or .sharedMemory (gt (int .gpu.count) 1) }}
- {name: shared-memory, mountPath: /dev/shm}
{{- end }}
{{- end -}}

{{- define "gradwire.sharedMemoryVolume" -}}
{{- if .sharedMemory }}
- {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}}
{{- else if gt (int .gpu.count) 1 }}
- {name: shared-memory, emptyDir: {medium: Memory}}
{{- end }}
{{- end -}}

{{- define "gradwire.trainerEnv" -}}
- {name: GRADWIRE_HOME, value: /data}
- {name: HF_HOME, value: /data/huggingface}
- {name: HOME, value: /tmp}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
